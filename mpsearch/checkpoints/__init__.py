"""Where finished work goes, and is found again."""
