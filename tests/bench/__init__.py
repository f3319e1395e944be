"""Huying beside Orthanc and DCMTK: the same data, the same clients, one run."""
