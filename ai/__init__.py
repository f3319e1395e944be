"""Model registry, inference, drafts, review. Empty until the issue that builds it."""
