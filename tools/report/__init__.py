"""Write a page on one run or several."""
