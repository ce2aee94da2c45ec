"""What each operator does with channels."""
