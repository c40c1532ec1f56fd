"""One process raises in its loader."""

import torch
import torch.distributed as dist

import nestor


def batches():
    for step in range(10):
        if step == 3 and dist.get_rank() == 1:
            raise RuntimeError("the loader of process 1 broke")
        yield torch.ones(4, 2)


torch.set_num_threads(1)
net = torch.nn.Linear(2, 1)
program = nestor.Program(
    net=nestor.Problem(
        net, lambda batch, net: net(batch).mean(), data=batches(), optimizer=torch.optim.SGD(net.parameters(), lr=0.1)
    )
)
nestor.Engine(program, runtime=nestor.DataParallel(), seed=0).run(10)
