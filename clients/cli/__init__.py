"""The `scalellm` command."""
