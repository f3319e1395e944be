"""The files of the first page, as the browser gets them."""
