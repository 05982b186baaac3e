"""Generated from protos/scalellm/v1 by `make protos`; not edited by hand."""
