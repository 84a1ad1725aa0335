"""What Gymnasium sees: one environment, a vector of them, and forms of their actions."""
