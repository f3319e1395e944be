"""Object stores: one protocol, files and S3 behind it."""
