"""Access to the files of a source: local and NFS folders, http(s) servers, S3 and GCS (docs/storage.md)."""
