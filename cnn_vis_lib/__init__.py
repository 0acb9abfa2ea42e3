"""What cnn_vis.py needs besides the method: one file for each subject. See CONTRIBUTING.md."""
