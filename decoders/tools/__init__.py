"""What treats all six models alike, through what they have in common."""
