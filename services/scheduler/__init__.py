"""The token core: decides who runs where and when, and moves requests away from executors that die."""
