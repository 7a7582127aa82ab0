"""The digital twin: what a workload would do on a whole supernode, from published figures, with its error
shown.
"""
