"""What a CPU needs besides: as many threads as help, and memory that stays."""
