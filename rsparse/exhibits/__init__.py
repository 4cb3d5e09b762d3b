"""What each exhibit measures, one file each; the notebooks call these and show the outcome."""
