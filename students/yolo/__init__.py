"""YOLOv4, YOLOv5 and YOLOv7, from their papers and published descriptions."""
