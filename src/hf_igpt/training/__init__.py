"""Training: arguments and recipes, the Trainer and its callbacks, and the stages of a run.

`arguments` resolved once · `trainer` the Trainer · `callbacks` clock, progress, pictures, milestones, pushes · `checkpoints` sealed
and verified · `resuming` which runs may continue · `runs` begin, build, train, finish · `costs` of a step. The commands that put them together are in `commands/`.
"""
