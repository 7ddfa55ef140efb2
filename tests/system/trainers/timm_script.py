"""A training and validation script in the shape of timm's own, which knows nothing of fxgraft.

It leaves in its output folder what ``CheckpointSaver`` writes, and the targets and losses of its steps for the tests.
"""

import argparse
import os
from contextlib import nullcontext
from pathlib import Path

import torch
from PIL import Image
from timm.data import FastCollateMixup, Mixup, create_loader
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models import create_model, load_checkpoint, resume_checkpoint
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import CheckpointSaver, ModelEmaV3, random_seed, update_summary
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

parser = argparse.ArgumentParser()
parser.add_argument("data")
parser.add_argument("--output", required=True)
parser.add_argument("--model", default="test_resnet")
parser.add_argument("--teacher")
parser.add_argument("--initial-checkpoint", default="")
parser.add_argument("--resume", default="")
parser.add_argument("--evaluate", default="")
parser.add_argument("--use-ema", action="store_true")
parser.add_argument("--num-classes", type=int, default=2)
parser.add_argument("--epochs", type=int, default=2)
parser.add_argument("--stop-epoch", type=int)
parser.add_argument("--accumulate", type=int, default=1)
parser.add_argument("--mixup", type=float, default=0.0)
parser.add_argument("--smoothing", type=float, default=0.1)
parser.add_argument("--sched-on-updates", action="store_true")
parser.add_argument("--device-modules", nargs="+", default=())
for flag in ("task", "no-prefetcher", "model-ema", "amp", "torchcompile", "torchscript", "plateau", "spoil"):
    parser.add_argument(f"--{flag}", action="store_true")


def criterion_of(args):
    if args.mixup:
        return SoftTargetCrossEntropy()
    return LabelSmoothingCrossEntropy(args.smoothing) if args.smoothing else nn.CrossEntropyLoss()


class Images(Dataset):
    """A folder of folders, in memory: timm's own data set leaves its files open."""

    def __init__(self, root):
        self.items = []
        for path in sorted(root.glob("*/*.png")):
            with Image.open(path) as image:
                self.items.append((image.convert("RGB"), "ab".index(path.parent.name)))

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        image, label = self.items[index]
        return self.transform(image), label


def loader_of(args, training, collate_fn=None):
    return create_loader(
        Images(Path(args.data, "train")),
        input_size=(3, 32, 32),
        batch_size=4,
        is_training=training,
        use_prefetcher=not args.no_prefetcher,
        num_workers=0,
        collate_fn=collate_fn,
        distributed=args.distributed,
        device=torch.device("cpu"),
    )


@torch.inference_mode()
def evaluate(model, args):
    model.eval()
    criterion = nn.CrossEntropyLoss()
    found = [(model(x), criterion(model(x), y)) for x, y in loader_of(args, training=False)]
    return torch.cat([out for out, _ in found]), torch.stack([loss for _, loss in found])


def train(model, args):
    collate_fn = mix = None
    if args.mixup:
        mixing = {"mixup_alpha": args.mixup, "num_classes": args.num_classes}
        if args.no_prefetcher:
            mix = Mixup(**mixing)
        else:
            collate_fn = FastCollateMixup(**mixing)
    loader = loader_of(args, True, collate_fn)
    criterion = criterion_of(args)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.05)
    start = resume_checkpoint(model, args.resume, optimizer, log_info=False) if args.resume else 0
    ema = ModelEmaV3(model, decay=0.5) if args.model_ema else None
    saver = CheckpointSaver(model, optimizer, args, ema, checkpoint_dir=args.output, max_history=1)
    trained = torch.compile(model, backend="eager") if args.torchcompile else model
    if args.distributed:
        trained = DistributedDataParallel(trained)
    if args.task:
        from timm.task import ClassificationTask

        task = ClassificationTask(trained, criterion, verbose=False)
    updates = (len(loader) + args.accumulate - 1) // args.accumulate
    schedule, epochs = create_scheduler_v2(
        optimizer,
        sched="plateau" if args.plateau else "cosine",
        num_epochs=args.epochs,
        step_on_epochs=not args.sched_on_updates,
        updates_per_epoch=updates,
    )
    if start:
        schedule.step(start)
    steps = []
    for epoch in range(start, args.stop_epoch or epochs):
        trained.train()
        for number, (x, y) in enumerate(loader):
            if mix is not None:
                x, y = mix(x, y)
            with torch.autocast("cpu", torch.bfloat16) if args.amp else nullcontext():
                loss = task(x, y)["loss"] if args.task else criterion(trained(x), y)
            loss /= args.accumulate
            loss.backward()
            steps.append((y, loss.item()))
            if (number + 1) % args.accumulate == 0 or number + 1 == len(loader):
                optimizer.step()
                optimizer.zero_grad()
                if ema is not None:
                    ema.update(model)
                schedule.step_update(epoch * updates + number // args.accumulate + 1)
        _, losses = evaluate(trained, args)
        schedule.step(epoch + 1, losses.mean().item())
        if args.rank == 0:
            summary = f"{args.output}/summary.csv"
            update_summary(epoch, {"loss": steps[-1][1]}, {"loss": losses.mean().item()}, summary, lr=0.05)
            saver.save_checkpoint(epoch, metric=-losses.mean().item())
    torch.save(steps, f"{args.output}/steps-{args.rank}.pt")
    torch.save(model.state_dict(), f"{args.output}/weights-{args.rank}.pt")


def main():
    args = parser.parse_args()
    for module in args.device_modules:
        __import__(module)
    args.rank = int(os.environ.get("RANK", "0"))
    args.distributed = "WORLD_SIZE" in os.environ
    if args.distributed:
        torch.distributed.init_process_group("gloo")
    Path(args.output).mkdir(parents=True, exist_ok=True)
    random_seed(0, args.rank)
    model = create_model(
        args.model,
        num_classes=args.num_classes,
        scriptable=args.torchscript,
        checkpoint_path=args.initial_checkpoint,
    )
    if args.teacher:
        teacher = create_model(args.teacher, num_classes=args.num_classes).eval()
        assert not any("graft" in name for name in teacher.state_dict())
    if args.spoil:
        return
    if args.evaluate:
        load_checkpoint(model, args.evaluate, args.use_ema)
        torch.save(evaluate(model, args), f"{args.output}/evaluation.pt")
    else:
        train(model, args)
    if args.distributed:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
