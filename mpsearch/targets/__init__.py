"""What each tool can carry out, and the bytes in which it stores it."""
