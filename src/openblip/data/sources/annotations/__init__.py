"""The annotation files of public data sets: for each format a function that makes rows of a file's content."""
