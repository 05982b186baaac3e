"""ScaleLLM beside other systems on this machine: the same weights, the same prompts, the same client and clock."""
