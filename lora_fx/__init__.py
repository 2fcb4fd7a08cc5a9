from .graph_module import adapter_names, trace_record, TraceRecord
from .tracing import trace
from .errors import *
