"""Generated from protos/scalellm/keda by `make protos`; not edited by hand."""
