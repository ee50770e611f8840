"""What some architectures need besides: one module per kind of attention."""
