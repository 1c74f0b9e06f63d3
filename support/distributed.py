"""The processes of a torchrun job."""
from contextlib import contextmanager
from datetime import timedelta

from support.runtime import LOCAL_RANK, RANK, WORLD_SIZE

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

class Ranks:
    """The processes of a run, one per GPU, and what they share; without torchrun just this one."""
    size, rank, first = WORLD_SIZE, RANK, RANK == 0

    def join(self, device):
        """Connect the processes. What fails before this fails in every process alike."""
        if self.size > 1:
            gpu = device if device.type == "cuda" else None
            dist.init_process_group("nccl" if gpu else "gloo", timeout=timedelta(minutes=30),
                                    device_id=gpu)
            self.on_cpu = dist.new_group(backend="gloo")

    def wait(self):
        if self.size > 1:
            dist.barrier()

    @contextmanager
    def first_on_machine(self):
        """Run the body in one process per machine first; the others then find what it fetched."""
        if LOCAL_RANK:
            self.wait()
        yield
        if not LOCAL_RANK:
            self.wait()

    def sum(self, *values):
        """Numbers or scalar tensors of each process → their sums as floats, in every process."""
        values = [float(v) for v in values]
        if self.size > 1:
            values = torch.tensor(values, dtype=torch.float64)
            dist.all_reduce(values, group=self.on_cpu)
            values = values.tolist()
        return values

    def largest(self, number):
        """The largest of the processes' numbers, as an int; does not wait for their GPUs."""
        if self.size > 1:
            number = torch.tensor(number)
            dist.all_reduce(number, dist.ReduceOp.MAX, group=self.on_cpu)
        return int(number)

    def parallel(self, model):
        """The model in DistributedDataParallel, if there are several processes."""
        if self.size == 1:
            return model
        return DistributedDataParallel(model, gradient_as_bucket_view=True)

    def leave(self):
        if self.size > 1:
            dist.destroy_process_group()
