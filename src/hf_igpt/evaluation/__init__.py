"""What is measured: records, metrics, counting baselines, held-out images, probes. Functions that know nothing of command lines."""
