// SPDX-License-Identifier: GPL-2.0-only

//! What a client can cost the host, at most: memory and time. The bounds are those of
//! `Documentation/threat-model.rst`, and what is measured is printed.

use crate::{
    migration_state::{begin, save, set, write},
    stream::with_pins,
};
use anyhow::{Result, ensure};
use harness::{Cgroup, Context, Scenario, Skip, in_file, scenario, slab_unreclaimable};
use mdev_dma::{GeneratorConfig, MdevDma, Opcode, uapi::RUST_MDEV_DMA_GEN_DMA_RW};
use std::{
    fmt::Write as _,
    fs, thread,
    time::{Duration, Instant},
};
use testbed::fixture::{Fixture, LONG, succeeded};
use testbed::{PAGE, at, same};
use vfio_client::{
    EventFd, Group, IrqData,
    MigState::{Resuming, Running, Stop, StopCopy},
    SetIrqs,
    uapi::{VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_PCI_NUM_IRQS},
};

pub const SCENARIOS: &[Scenario] = &[
    scenario("device/cost/open", "memory of open devices, as many as there can be", open),
    scenario(
        "device/cost/pins",
        "memory and time of MAX_PINS pins, each as far from the others as costs most: loaded, reset, \
         unmapped, closed",
        pins,
    ),
    scenario(
        "device/cost/background-pins",
        "what pins in the background need is charged to the client, as in the foreground",
        background_pins,
    ),
    scenario("device/cost/data-files", "memory of data files that have ended", data_files),
    scenario("device/cost/eventfds", "a device keeps five eventfds, and no more", eventfds),
    scenario(
        "device/cost/commands",
        "time of commands of MAX_LENGTH, which nothing interrupts, and of STOP, RESET and unmap meanwhile",
        commands,
    ),
    scenario(
        "device/cost/worker",
        "time of the CPU that a device takes outside of its client's cgroup: at most half of one",
        worker,
    ),
];

/// What a cgroup may be charged more than it has, on two CPUs.
const SLACK: u64 = 512 << 10;

/// Pages from one batch of pins to the next, each of which has memory of its own.
const BATCH: u64 = 64;

pub(crate) const KIB: u64 = 1 << 10;

/// What is charged to a cgroup for what is done.
pub(crate) fn charged(cgroup: &Cgroup, what: impl FnOnce() -> Result<()>) -> Result<u64> {
    let before = cgroup.charged()?;
    what()?;
    Ok(cgroup.charged()?.saturating_sub(before))
}

pub(crate) fn at_most(what: &str, bound: u64, found: u64) -> Result<()> {
    ensure!(found <= bound + SLACK, "{what}: {} KiB, at most {} KiB", found / KIB, bound / KIB);
    Ok(())
}

/// How long something takes, which must not be long.
fn timed(what: impl FnOnce() -> Result<()>) -> Result<Duration> {
    let begin = Instant::now();
    what()?;
    let took = begin.elapsed();
    ensure!(took < LONG, "it took {took:?}");
    Ok(took)
}

fn open(context: &Context<'_>) -> Result<()> {
    without_debugging()?;
    // The driver has 16 for all scenarios.
    const DEVICES: usize = 8;
    const EACH: u64 = 72 * KIB;
    let fixture = Fixture::without_mapping(context, 0, 1)?;
    let mdevs = (1..DEVICES).map(|i| context.device(i)).collect::<Result<Vec<_>>>()?;
    let cgroup = Cgroup::new()?;
    let mut devices = Vec::new();
    let bytes = charged(&cgroup, || {
        for mdev in &mdevs {
            let node = mdev.node()?;
            fixture.container.attach(Group::open(&node)?)?;
            devices.push(MdevDma::open(&fixture.container, &node)?);
        }
        Ok(())
    })?;
    let count = devices.len() as u64;
    context.progress(format_args!("an open device: {} KiB", bytes / count / KIB));
    at_most("open devices", count * EACH, bytes)
}

/// Skips the scenario where slabs are larger than what is in them: such kernels need more memory, and
/// time, than others.
pub(crate) fn without_debugging() -> Result<()> {
    let size = |name| fs::read_to_string(format!("/sys/kernel/slab/kmalloc-64/{name}")).ok();
    if size("slab_size") != size("object_size") {
        return Err(Skip("costs are those of a kernel that doesn't debug slabs".into()).into());
    }
    Ok(())
}

fn pins(context: &Context<'_>) -> Result<()> {
    without_debugging()?;
    let mut fixture = Fixture::without_mapping(context, 0, 1)?;
    let max = fixture.device().limits()?.max_pins;
    let stream = with_pins(&save(&fixture)?, at(0, 0), BATCH * PAGE, max);
    drop(fixture);
    // All of the memory is there before it would be charged: a page of each batch.
    let (_file, memory) = in_file(max * BATCH * PAGE)?;
    for page in 0..max {
        memory.write((page * BATCH * PAGE) as usize, &[1; 8]);
    }
    fixture = Fixture::with_memory(context.device(0)?, memory)?;
    fixture.map(0..max * BATCH)?;

    let cgroup = Cgroup::new()?;
    let mut text = String::new();
    for end in ["reset", "unmap", "close"] {
        let slab = slab_unreclaimable()?;
        let file = begin(&fixture, Resuming)?;
        // A call takes no more.
        let data = charged(&cgroup, || stream.chunks(1 << 16).try_for_each(|p| write(&file, p)))?;
        let before = cgroup.charged()?;
        let load = timed(|| set(&fixture, Stop))?;
        drop(file);
        // The data isn't there any more.
        let pins = (cgroup.charged()? + data).saturating_sub(before);
        same("PINS", max, fixture.device().pins()?)?;
        let uncharged = slab_unreclaimable()?.saturating_sub(slab).saturating_sub(pins);
        let took = timed(|| match end {
            "reset" => Ok(fixture.device().device().reset()?),
            "unmap" => fixture.unmap(0..max * BATCH),
            _ => {
                fixture.close();
                Ok(())
            }
        })?;
        let left = cgroup.charged()?.saturating_sub(before.saturating_sub(data));
        let _ = write!(text, ", {end} {took:.1?}");
        match end {
            "reset" => {
                let [data, pins, uncharged] = [data, pins, uncharged].map(|bytes| bytes / KIB);
                context.progress(format_args!(
                    "{max} pins: data {data} KiB, pins {pins} KiB, of type1, charged to nobody, \
                     {uncharged} KiB; load {load:.1?}"
                ));
            }
            "unmap" => {
                fixture.device().device().reset()?;
                fixture.map(0..max * BATCH)?;
            }
            _ => (),
        }
        at_most("data", 2 * 1024 * KIB, data)?;
        at_most("pins", max * 768, pins)?;
        ensure!(pins > max * 512, "{pins} bytes are charged for {max} pins: not all of them");
        // A pin of type1's, and what the kernel keeps of two objects that are charged.
        at_most("what is charged to nobody", max * (64 + 2 * 8), uncharged)?;
        at_most("what is left", 0, left)?;
    }
    context.progress(format_args!("{max} pins{text}"));
    Ok(())
}

fn background_pins(context: &Context<'_>) -> Result<()> {
    without_debugging()?;
    const PINS: u64 = 1 << 12;
    let (_file, memory) = in_file(PINS * BATCH * PAGE)?;
    for page in 0..PINS {
        memory.write((page * BATCH * PAGE) as usize, &[1; 8]);
    }
    let fixture = Fixture::with_memory(context.device(0)?, memory)?;
    fixture.map(0..PINS * BATCH)?;
    let device = fixture.device();
    let cgroup = Cgroup::new()?;
    let bytes = charged(&cgroup, || {
        (0..PINS).try_for_each(|n| {
            device.run_in_background(Opcode::Pin, at(n * BATCH, 0), PAGE, 0)?;
            succeeded("PIN", device.wait(LONG)?)
        })
    })?;
    context.progress(format_args!("{PINS} pins in the background: {} KiB", bytes / KIB));
    same("PINS", PINS, device.pins()?)?;
    at_most("pins", PINS * 768, bytes)?;
    ensure!(bytes > PINS * 512, "{bytes} bytes are charged for {PINS} pins: not all of them");
    Ok(())
}

fn data_files(context: &Context<'_>) -> Result<()> {
    without_debugging()?;
    const FILES: u64 = 400;
    const EACH: u64 = 4 * KIB;
    let fixture = Fixture::new(context, 1)?;
    let cgroup = Cgroup::new()?;
    let mut files = Vec::new();
    let bytes = charged(&cgroup, || {
        for n in 0..FILES {
            if n % 2 == 0 {
                files.push(begin(&fixture, StopCopy)?);
            } else {
                let file = begin(&fixture, Resuming)?;
                write(&file, &[1; 1 << 16])?;
                files.push(file);
            }
            fixture.device().device().reset()?;
        }
        Ok(())
    })?;
    context.progress(format_args!("a data file that has ended: {} bytes", bytes / FILES));
    at_most("ended data files", FILES * EACH, bytes)
}

fn eventfds(context: &Context<'_>) -> Result<()> {
    let fixture = Fixture::new(context, 1)?;
    let device = fixture.device().device();
    let mut most = 0;
    for index in 0..VFIO_PCI_NUM_IRQS {
        let count = device.irq_info(index, None)?.count;
        most += count;
        // Beyond these there is no place for one.
        let eventfd = EventFd::new()?;
        let fds = [Some(std::os::fd::AsFd::as_fd(&eventfd))];
        let args = SetIrqs {
            index,
            action: VFIO_IRQ_SET_ACTION_TRIGGER,
            start: count,
            count: 1,
            data: IrqData::EventFd(&fds),
            argsz: None,
        };
        ensure!(device.set_irqs(&args).is_err(), "index {index} has more than {count}");
    }
    context.progress(format_args!("eventfds: {most}, and one that unmasks INTx"));
    same("eventfds", 5, most.into())
}

fn commands(context: &Context<'_>) -> Result<()> {
    without_debugging()?;
    let mut fixture = Fixture::without_mapping(context, 0, 1)?;
    let length = fixture.device().limits()?.max_length;
    drop(fixture);
    fixture = Fixture::new(context, length / PAGE)?;
    let device = fixture.device();
    let mut text = String::new();
    for op in [Opcode::Pin, Opcode::Write, Opcode::Read, Opcode::DmaWrite, Opcode::DmaRead] {
        let took = timed(|| succeeded("it", device.run(op as u32, at(0, 0), length, 1)?))?;
        let _ = write!(text, "{op} {took:.1?}, ");
    }
    let begin = |op| -> Result<()> {
        // It starts when the worker has rested.
        thread::sleep(Duration::from_secs(1));
        device.run_in_background(op, at(0, 0), length, 2)?;
        thread::sleep(Duration::from_millis(5));
        Ok(())
    };
    begin(Opcode::Write)?;
    let stop = timed(|| set(&fixture, Stop))?;
    set(&fixture, Running)?;
    begin(Opcode::Write)?;
    let reset = timed(|| Ok(device.device().reset()?))?;
    // It waits for the pins that are being taken, and revokes them.
    begin(Opcode::Pin)?;
    let unmap = timed(|| fixture.unmap(0..length / PAGE))?;
    same("PINS of what is unmapped", 0, device.pins()?)?;
    context.progress(format_args!(
        "{} MiB: {text}STOP {stop:.1?} and RESET {reset:.1?} beside a WRITE, unmap {unmap:.1?} beside a PIN",
        length >> 20
    ));
    Ok(())
}

/// What is taken for half of a CPU: what is measured are ticks, and a rest is in whole jiffies.
const HALF: std::ops::Range<f64> = 0.05..0.6;

fn worker(context: &Context<'_>) -> Result<()> {
    const MEASURED: Duration = Duration::from_secs(3);
    const PAGES: u64 = 1 << 14;
    let fixture = Fixture::new(context, PAGES)?;
    let (device, length) = (fixture.device(), PAGES * PAGE);
    let nothing = || {
        thread::sleep(MEASURED);
        Ok(())
    };
    let commands = || {
        let begin = Instant::now();
        while begin.elapsed() < MEASURED {
            device.run_in_background(Opcode::DmaWrite, at(0, 0), length, 1)?;
            succeeded("it", device.wait(LONG)?)?;
        }
        Ok(())
    };

    let others = kworkers_during(nothing)?;
    let mode = RUST_MDEV_DMA_GEN_DMA_RW;
    let config = GeneratorConfig { iova: at(0, 0), length, seed: 1, limit: 0, rate: 0, mode };
    device.start_generator(&config)?;
    let generator = kworkers_during(nothing)?;
    same("status of the generator", 0, device.stop_generator()?.status.into())?;
    for (what, share) in [("the generator", generator), ("commands", kworkers_during(commands)?)] {
        let text = format!("{what}: {:.0} % of a CPU", (share - others) * 100.0);
        context.progress(&text);
        ensure!(HALF.contains(&(share - others)), text);
    }
    Ok(())
}

/// The part of a CPU's time that kworkers take while something is done.
fn kworkers_during(what: impl FnOnce() -> Result<()>) -> Result<f64> {
    let (begin, before) = (Instant::now(), kworkers()?);
    what()?;
    Ok((kworkers()? - before) / begin.elapsed().as_secs_f64())
}

/// The time of CPUs that kworkers have taken, in seconds.
fn kworkers() -> Result<f64> {
    let stats = procfs::process::all_processes()?.filter_map(|process| process.ok()?.stat().ok());
    let kworkers = stats.filter(|stat| stat.comm.starts_with("kworker/"));
    let ticks: u64 = kworkers.map(|stat| stat.utime + stat.stime).sum();
    Ok(ticks as f64 / procfs::ticks_per_second() as f64)
}
