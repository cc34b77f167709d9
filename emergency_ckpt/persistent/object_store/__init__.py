"""Object stores (S3, GCS, and a file system in the same form): byte-level operations, all with time limits."""
