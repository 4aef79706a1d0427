"""Weight streaming: components whose weights are a cache on the device, copied in ahead of need, never copied back."""
