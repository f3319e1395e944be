"""The DICOM upper layer and the DIMSE services."""
