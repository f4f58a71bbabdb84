"""fastorgan: liver, kidneys, spleen and pancreas in an abdominal CT, in seconds.

`Cascade` is the whole of the method; importing this package loads neither torch nor OpenVINO.
"""

__version__ = "0.1.0"
