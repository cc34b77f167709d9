"""Commands and manifests that bring a job onto a cluster, rendered from one validated set of values."""
