"""The engines that replay a trace under a policy."""
