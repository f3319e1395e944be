"""The DICOM archive: ingest, query, retrieve, DIMSE, DICOMweb."""
