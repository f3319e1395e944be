"""IHE XDS.b and XDS-I.b actors. Empty until the issue that builds it."""
