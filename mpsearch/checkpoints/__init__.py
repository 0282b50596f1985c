"""Finished work: keys that are records, values as bytes, and stores in memory and in a file."""
