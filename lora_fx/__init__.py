from .graph_module import adapter_names, trace_record, TraceRecord
from .tracing import trace
from .errors import *
from .sites import find_sites, find_all_linear_names, Site
from .plan import make_plan, Plan
from .config import LoraConfig
from .injection import inject
from .parameters import *
from .folding import *
from .folding import fold, unfold, fold_report
