"""Settings of ONNX Runtime's sessions that engines and measurements share."""

# A session's threads stop spinning when a run ends. Otherwise, where several sessions run in turn, the threads of one
# take the cores from the next: on two threads a ViT-B in int8 seemed to take 73 ms and takes 39. Alone, a session is as
# fast with this setting as without.
STOP_SPINNING = ("session.force_spinning_stop", "1")
