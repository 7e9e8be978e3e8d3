"""Training: arguments and recipes, the Trainer and its callbacks, and the stages of a run.

`arguments` resolved once · `trainer` the Trainer · `callbacks` clock, progress, pictures, milestones, pushes · `runs` begin, resume,
build, train, finish. The commands that put them together are in `commands/`.
"""
