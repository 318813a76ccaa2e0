"""Programs that project with ours through dattri and dattri-llm, and print scores and their ingredients as JSON."""

TRACIN = """
import json, sys, types
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
# Only their correlation metrics need scipy.
sys.modules["scipy"] = types.ModuleType("scipy")
sys.modules["scipy.stats"] = types.ModuleType("scipy.stats")
sys.modules["scipy.stats"].pearsonr = sys.modules["scipy.stats"].spearmanr = None
from dattri.algorithm.tracin import TracInAttributor  # before ours are in place
from dattri.task import AttributionTask
from less_fast.compat import dattri as ours
ours.install()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 3))
checkpoints = []
for _ in range(2):
    for p in model.parameters():
        p.data.normal_(std=0.3)
    checkpoints.append({k: v.clone() for k, v in model.state_dict().items()})
x, y = torch.randn(10, 12), torch.randint(3, (10,))
def loss(params, data):
    image, label = data
    out = torch.func.functional_call(model, params, image.unsqueeze(0))
    return nn.functional.cross_entropy(out, label.unsqueeze(0))
task = AttributionTask(loss, model, checkpoints)
kwargs = {"proj_dim": 64, "proj_max_batch_size": 16, "proj_seed": 5, "proj_type": "srht", "device": "cpu"}
attributor = TracInAttributor(task, torch.tensor([0.3, 0.7]), False, projector_kwargs=kwargs)
data = TensorDataset(x, y)
train, test = DataLoader(data, batch_size=4), DataLoader(TensorDataset(x[:3], y[:3]), batch_size=3)
scores = attributor.attribute(train, test)
grads = []
for checkpoint in checkpoints:
    model.load_state_dict(checkpoint)
    rows = []
    for i in range(10):
        value = nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))]).tolist())
    grads.append(rows)
print(json.dumps({"scores": scores.tolist(), "grads": grads}))
"""

LLM = """
import json
import torch
from torch import nn
from torch.utils.data import Dataset
from dattri_llm import (
    REGISTER_ALL, AttributionArguments, AttributionTask, HookManagerConfig, LESSAttributor, TracInAttributor
)
from less_fast.compat.dattri import random_project
torch.manual_seed(0)
model = nn.Sequential()
model.add_module("first", nn.Linear(12, 8, bias=False))
model.add_module("tanh", nn.Tanh())
model.add_module("last", nn.Linear(8, 3, bias=False))
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = model
    def forward(self, x, y=None):
        return self.body(x)
net = Net().eval()
class Pairs(Dataset):
    def __init__(self, n):
        self.x, self.y = torch.randn(n, 12), torch.randn(n, 3)
    def __len__(self):
        return len(self.x)
    def __getitem__(self, i):
        return {"x": self.x[i], "y": self.y[i]}
def loss(net, batch):
    return ((net(batch["x"]) - batch["y"]) ** 2).sum()
train, test = Pairs(6), Pairs(4)
optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
for i in range(6):
    optimizer.zero_grad()
    loss(net, {k: v[None] for k, v in train[i].items()}).backward()
    optimizer.step()
optimizer.zero_grad()
def gradients(data):
    rows = []
    for i in range(len(data)):
        value = loss(net, {k: v[None] for k, v in data[i].items()})
        rows.append([g.flatten().tolist() for g in torch.autograd.grad(value, list(net.parameters()))])
    return rows
state = [[optimizer.state[p][k].flatten().tolist() for k in ("exp_avg", "exp_avg_sq")] for p in net.parameters()]
answer = {"train": gradients(train), "test": gradients(test), "adam": state}
args = AttributionArguments(
    output_dir="out", per_device_train_batch_size=2, per_device_eval_batch_size=2, use_cpu=True,
    dataloader_pin_memory=False,
)
task = AttributionTask(loss_func=loss, model=net)
for name, make in {
    "tracin": lambda: TracInAttributor(args, task=task),
    "less": lambda: LESSAttributor(args, task=task, optimizers=[optimizer], checkpoint_weights=[1.0]),
}.items():
    config = HookManagerConfig(
        linear_io=REGISTER_ALL,
        projector=random_project,
        projection_kwargs={"__default__": {"style": "dense", "proj_dim": 64, "proj_type": "srht", "proj_seed": 5}},
    )
    answer[name] = make().attribute(train, test, hook_config=config).agnostic_matrix()[1].tolist()
print(json.dumps(answer))
"""
