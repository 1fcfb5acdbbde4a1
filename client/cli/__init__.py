"""The `cxlmq` command."""
