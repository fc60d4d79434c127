"""Stand-ins: functions with the signatures of other libraries' that compute the same in torch, on any device.

With them an adapter's every line runs and is judged on a CPU, so that only the library itself is left untested there.
Where the library leaves memory unwritten, a stand-in writes NaN. Written from the libraries' documented behaviour.
"""
