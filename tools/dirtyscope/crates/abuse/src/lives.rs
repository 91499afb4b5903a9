// SPDX-License-Identifier: GPL-2.0-only

//! Clients that end, lose their device, are disturbed, or aren't alone: one life of such each.

use crate::{
    backend::Backend,
    calls::Call,
    client::{self, Client, How},
    input::{Input, Kind, Stock},
    rng::Rng,
    served,
    stream::{self, Change},
    table::Table,
    world::{self, IOVA, MAPPED, RESUMING, RUNNING, STOP_COPY, Spot, World},
};
use anyhow::{Context as _, Result, bail, ensure};
use harness::new_uuid;
use mdev_dma::{
    PAGE,
    sysfs::{Mdev, MdevType},
};
use rustix::process::{Resource, Rlimit, Signal, getrlimit, kill_process, setrlimit};
use std::{
    fs,
    path::Path,
    process::Command,
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    thread,
    time::{Duration, Instant},
};
use vfio_client::hostile::{Answer, HostileFile, Request};

/// What takes longer is broken.
const LONG: Duration = Duration::from_secs(20);

/// What ends within that isn't in time, but the kernel may take it.
const SOON: Duration = Duration::from_millis(20);

/// Processes of many threads that are killed.
const CROWDS: u64 = 4;

/// Inputs of each thread.
const THREAD_INPUTS: u64 = 500;

/// Lives one. What came of its calls goes to the table.
pub fn live(kind: Kind, rng: &mut Rng, mdev: Mdev, stock: &Stock, table: &mut Table) -> Result<()> {
    match kind {
        Kind::Signals => signals(rng, mdev, stock, table),
        Kind::Files => files(rng, mdev, stock, table),
        Kind::Descriptors => descriptors(rng, mdev, stock, table),
        Kind::Kills => kills(rng, mdev, stock, table),
        Kind::Removals => removals(rng, mdev, stock, table),
        Kind::Served => served::live(rng, mdev, stock, table),
        Kind::Listings => listings(mdev, table),
        Kind::Threads => threads(rng, mdev, stock, table),
        Kind::Ioctls | Kind::Regions | Kind::Registers | Kind::States => bail!("this is no life"),
    }
}

/// A valid state is loaded, and pages pinned, while signals come that end nobody. Loading must succeed:
/// a state that a signal destroys is lost.
fn signals(rng: &mut Rng, mdev: Mdev, stock: &Stock, table: &mut Table) -> Result<()> {
    let base = stock.streams.get(1).context("no stream")?;
    let runs = (0..24).map(|i| Change::Run {
        iova: IOVA + (16 + 2 * i) * PAGE,
        pages: 1,
        count: 1 + rng.below(3) as u32,
        counted: true,
    });
    let stream = stream::apply(base, &runs.collect::<Vec<_>>());
    let mut world = stock.world(mdev)?;
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let me = rustix::process::getpid();
        let done = &done;
        scope.spawn(move || {
            while !done.load(Relaxed) {
                // It is handled, and so interrupts, and does nothing else.
                let _ = kill_process(me, Signal::USR1);
            }
        });
        let result = (0..8).try_for_each(|_| disturbed(&mut world, &stream, table));
        done.store(true, Relaxed);
        result
    })?;
    world.works()
}

fn disturbed(world: &mut World, stream: &[u8], table: &mut Table) -> Result<()> {
    let loaded = world.load(stream, RUNNING)?;
    table.count("load among signals", loaded.err().unwrap_or(0));
    ensure!(loaded.is_ok(), "a valid state, among signals: errno {loaded:?}");
    let outcome = world.device.pin(IOVA, MAPPED * PAGE)?;
    table.count("PIN among signals", outcome.status as i32);
    const EINTR: u32 = 4;
    ensure!(matches!(outcome.status, 0 | EINTR), "PIN among signals: {outcome:?}");
    world.data.clear();
    world.reset()
}

/// Two threads read or write one data file, while the device goes to another state, is reset, or closed.
fn files(rng: &mut Rng, mdev: Mdev, stock: &Stock, table: &mut Table) -> Result<()> {
    let mut world = stock.world(mdev)?;
    let writes = rng.one_in(2);
    let state = if writes { RESUMING } else { STOP_COPY };
    ensure!(world.set_state(state).is_ok(), "no state {state}");
    if writes && rng.one_in(8) {
        return flood(&mut world, table);
    }
    let file = world.data.pop().context("no data file")?;
    if !writes {
        // Some of it has been read when it ends.
        let read = file.read(stock.ground, stock.ground.address(0), 16, None);
        ensure!(read.errno() == Some(0), "a data file: {read:?}");
    }
    let others = [file.duplicate()?, file.duplicate()?];
    let closes = rng.one_in(4);
    let (next, moment) = (rng.pick(&[0, RUNNING, 1, 7]), Duration::from_micros(rng.below(2000)));
    let seed = rng.next();
    let answers = thread::scope(|scope| {
        let threads = others.into_iter().enumerate().map(|(i, file)| {
            let ground = stock.grounds[i];
            scope.spawn(move || {
                let mut rng = Rng::new(seed, "files", i as u64);
                let at = world::address(ground, Spot::Buffer(0));
                let mut errnos = Vec::new();
                for _ in 0..20 {
                    let len = 1 + rng.below(300) as usize;
                    let answer = match writes {
                        true => file.write(ground, at, len, None),
                        false => file.read(ground, at, len, None),
                    };
                    errnos.extend(answer.errno());
                    let arg = world::address(ground, Spot::Argument);
                    errnos.extend(file.ioctl(ground, Request::vfio(21), arg, None).errno());
                }
                errnos
            })
        });
        let threads: Vec<_> = threads.collect();
        thread::sleep(moment);
        let world = if closes {
            drop(world);
            None
        } else {
            match next {
                0 => table.count("reset beside data file", world.reset().is_err().into()),
                state => {
                    let errno = world.set_state(state).err().unwrap_or(0);
                    table.count("state beside data file", errno);
                }
            }
            Some(world)
        };
        let errnos = threads.into_iter().flat_map(|thread| thread.join().unwrap_or_default());
        (world, errnos.collect::<Vec<_>>())
    });
    let (world, errnos) = answers;
    if closes || next == 0 {
        let at = stock.ground.address(0);
        let answer = match writes {
            true => file.write(stock.ground, at, 8, None),
            false => file.read(stock.ground, at, 8, None),
        };
        const ENODEV: i32 = 19;
        ensure!(answer.errno() == Some(ENODEV), "a data file after reset or close: {answer:?}");
    }
    for errno in errnos {
        table.count(if writes { "data file, 2 writers" } else { "data file, 2 readers" }, errno);
    }
    world.map_or(Ok(()), |mut world| world.works())
}

/// More is written than a device of ours can have as its state, which must end.
fn flood(world: &mut World, table: &mut Table) -> Result<()> {
    const BYTES: usize = 4 * PAGE as usize;
    const ENOUGH: usize = 16 << 20;
    let file = world.data.last().context("no data file")?;
    let at = world.address(Spot::Buffer(0));
    let write = |_| file.write(world.ground, at, BYTES, None).errno().filter(|&errno| errno != 0);
    let refused = (0..ENOUGH / BYTES).find_map(write);
    let errno = refused.context("more than 16 MiB are taken for a state")?;
    table.count("data file, too much", errno);
    world.works()
}

/// No more files can be opened when a state, or the device, wants one.
fn descriptors(rng: &mut Rng, mdev: Mdev, stock: &Stock, table: &mut Table) -> Result<()> {
    let mut world = stock.world(mdev)?;
    // The lowest number that is free is the next.
    let next = world.container.file.duplicate()?.number() as u64;
    let before = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: Some(next), ..before })?;
    let mut errnos = Vec::new();
    for _ in 0..4 {
        let state = rng.pick(&[RESUMING, STOP_COPY, 6, 7, RUNNING]);
        errnos.push(("state, no descriptors", world.set_state(state).err().unwrap_or(0)));
    }
    let opened = world.open_once_more();
    let errno = opened.and_then(|answer| answer.errno());
    errnos.extend(errno.map(|errno| ("device, no descriptors", errno)));
    setrlimit(Resource::Nofile, before)?;
    for (entry, errno) in errnos {
        table.count(entry, errno);
    }
    world.data.clear();
    world.works()
}

/// A client is killed in the midst of what it does.
fn kills(rng: &mut Rng, mdev: Mdev, stock: &Stock, table: &mut Table) -> Result<()> {
    let how = match rng.pick(&How::ALL) {
        // With iommufd a device's file doesn't hold its group, which the next client can open while the
        // other process still ends; it then has the device with the first one's memory. That is VFIO's
        // (Documentation/threat-model.rst).
        How::Shares if stock.backend == Backend::Group => How::Forks,
        how => how,
    };
    let mut client = Client::start(mdev, stock.backend, rng.next(), how)?;
    thread::sleep(Duration::from_micros(rng.below(SOON.as_micros() as u64)));
    client.kill()?;
    table.count(client::entry(how), 0);
    stock.world(mdev)?.works()
}

/// The device is removed, and the driver is to be unloaded, while it is in use, or while only its group
/// is open, or a data file.
fn removals(rng: &mut Rng, mdev: Mdev, stock: &Stock, table: &mut Table) -> Result<()> {
    let mdev_type = mdev.mdev_type()?;
    let how = rng.below(4);
    let held = match how {
        3 => return irqs_beside_removal(rng, mdev, stock, table),
        0 => Held::Client(Client::start(mdev, stock.backend, rng.next(), How::Busy)?),
        1 if stock.backend == Backend::Cdev && rng.one_in(2) => {
            let [_, node] = stock.backend.paths(mdev)?;
            Held::Unbound(HostileFile::open(&node.to_string_lossy())?)
        }
        1 => {
            let World { device, group, container, .. } = stock.world(mdev)?;
            drop(device);
            Held::Files(group.into_iter().chain([container.file]).collect())
        }
        _ => {
            let mut world = stock.world(mdev)?;
            ensure!(world.set_state(STOP_COPY).is_ok(), "no STOP_COPY");
            Held::Files(std::mem::take(&mut world.data))
        }
    };
    if how != 1 {
        // Whoever has the device open, or a file of it, has the driver.
        let output = Command::new("rmmod").arg(mdev_type.driver()).output().context("rmmod")?;
        ensure!(!output.status.success(), "the driver was unloaded although it was in use");
        table.count("unload while in use", 16);
    }
    let begin = Instant::now();
    thread::scope(|scope| -> Result<()> {
        let removal = scope.spawn(|| mdev.remove());
        thread::sleep(Duration::from_micros(rng.below(SOON.as_micros() as u64)));
        match held {
            Held::Client(mut client) => {
                ensure!(!removal.is_finished(), "it was removed while it was in use");
                client.kill()?;
            }
            Held::Unbound(file) => {
                // It can do nothing but keep the device.
                let memory = world::address(stock.ground, Spot::Argument);
                for nr in [7, 8, 11, 17, 19] {
                    let answer = file.ioctl(stock.ground, Request::vfio(nr), memory, None);
                    ensure!(
                        answer.errno() != Some(0),
                        "call {nr} of an unbound device: {answer:?}"
                    );
                    answer.errno().into_iter().for_each(|errno| table.count("unbound", errno));
                }
                ensure!(!removal.is_finished(), "it was removed while a file of it was open");
            }
            Held::Files(files) => {
                while !removal.is_finished() && begin.elapsed() < LONG {
                    thread::sleep(Duration::from_millis(1));
                }
                ensure!(removal.is_finished(), "it can't be removed while no device is open");
                for file in files {
                    let at = world::address(stock.ground, Spot::Argument);
                    for nr in [3, 5, 6, 21] {
                        let answer = file.ioctl(stock.ground, Request::vfio(nr), at, None);
                        let errno = answer.errno();
                        ensure!(
                            !matches!(answer, Answer::Opened(_)),
                            "a removed device was opened"
                        );
                        errno.into_iter().for_each(|errno| table.count("after removal", errno));
                    }
                }
            }
        }
        let removed = removal.join().map_err(|_| anyhow::anyhow!("the removal panicked"))?;
        table.count("removal", removed.err().map_or(0, |error| error.errno()));
        Ok(())
    })?;
    ensure!(!mdev.exists(), "it was removed, and is still there");
    mdev_type.create(mdev.uuid)?;
    stock.world(mdev)?.works()
}

/// Interrupts are set in every way by two threads, also by one descriptor, while the device is to be
/// removed, which asks for it by one of them.
fn irqs_beside_removal(rng: &mut Rng, mdev: Mdev, stock: &Stock, table: &mut Table) -> Result<()> {
    let mdev_type = mdev.mdev_type()?;
    let world = stock.world(mdev)?;
    let seed = rng.next();
    let done = AtomicBool::new(false);
    thread::scope(|scope| -> Result<()> {
        let threads = (0..2).map(|i| -> Result<_> {
            let world = world.share(stock.grounds[i])?;
            let done = &done;
            Ok(scope.spawn(move || {
                let mut table = Table::default();
                for n in 0.. {
                    if done.load(Relaxed) {
                        break;
                    }
                    let mut rng = Rng::new(seed, "irqs", ((i as u64) << 32) + n);
                    let answer = Call::named("SET_IRQS", &mut rng).make(&world, &stock.eventfd);
                    let errno = answer.and_then(|answer| answer.errno());
                    errno.into_iter().for_each(|errno| table.count("SET_IRQS and removal", errno));
                    // What it says goes to those.
                    let _ = world.device.enable_irqs(3);
                    let _ = world.device.dma_read(IOVA, PAGE);
                }
                table
            }))
        });
        let threads = threads.collect::<Result<Vec<_>>>()?;
        let removal = scope.spawn(|| mdev.remove());
        thread::sleep(Duration::from_micros(rng.below(SOON.as_micros() as u64)));
        let early = removal.is_finished();
        done.store(true, Relaxed);
        for thread in threads {
            table.append(thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?);
        }
        drop(world);
        let removed = removal.join().map_err(|_| anyhow::anyhow!("the removal panicked"))?;
        ensure!(!early, "it was removed while it was in use");
        removed?;
        Ok(())
    })?;
    mdev_type.create(mdev.uuid)?;
    stock.world(mdev)?.works()
}

/// What holds a device, or its driver.
enum Held {
    /// The device's own file, which was never bound to an iommufd.
    Unbound(HostileFile),
    Client(Client),
    Files(Vec<HostileFile>),
}

/// All that `mdevctl list` reads is read while devices come and go.
fn listings(mdev: Mdev, table: &mut Table) -> Result<()> {
    let mdev_type = mdev.mdev_type()?;
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut files = 0;
            while !done.load(Relaxed) {
                files += read_all(Path::new("/sys/class/mdev_bus"), 4);
                files += read_all(Path::new("/sys/bus/mdev/devices"), 3);
            }
            files
        });
        let result = come_and_go(&mdev_type);
        done.store(true, Relaxed);
        let files = reader.join().unwrap_or(0);
        ensure!(files > 0, "nothing was read of sysfs");
        table.count("mdev listing", 0);
        result
    })
}

fn come_and_go(mdev_type: &MdevType) -> Result<()> {
    for _ in 0..4 {
        let devices = (0..3).map(|_| Ok(mdev_type.create(new_uuid()?)?));
        for device in devices.collect::<Result<Vec<_>>>()? {
            device.remove()?;
        }
    }
    Ok(())
}

/// Reads all files of a directory that can be read, and those below. What is gone meanwhile is no error.
fn read_all(directory: &Path, depth: usize) -> usize {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let mut files = 0;
    for entry in entries {
        let path = entry.path();
        if path.is_dir() && depth > 0 {
            files += read_all(&path, depth - 1);
        } else if fs::read(&path).is_ok() {
            files += 1;
        }
    }
    files
}

/// Eight threads share a container and a device, and do anything, while the device is to be removed, too;
/// then eight of a process that is killed.
fn threads(rng: &mut Rng, mdev: Mdev, stock: &Stock, table: &mut Table) -> Result<()> {
    let mdev_type = mdev.mdev_type()?;
    let world = stock.world(mdev)?;
    let seed = rng.next();
    let removal = rng.one_in(2).then(|| Duration::from_millis(rng.below(500)));
    let tables = thread::scope(|scope| -> Result<Vec<Table>> {
        let threads = stock.grounds.iter().zip(0..).map(|(ground, i)| {
            let mut world = world.share(ground)?;
            Ok(scope.spawn(move || {
                let mut table = Table::default();
                for n in 0..THREAD_INPUTS {
                    let kind = [Kind::Ioctls, Kind::Registers, Kind::States][(n % 3) as usize];
                    let input = Input::new(kind, seed, (i << 32) + n);
                    // Others disturb: what the device then does wrong isn't wrong.
                    if let Ok(outcome) = input.run(&mut world, stock) {
                        table.add(&outcome);
                    }
                }
                table
            }))
        });
        let threads = threads.collect::<Result<Vec<_>>>()?;
        let removal = removal.map(|moment| {
            thread::sleep(moment);
            scope.spawn(|| mdev.remove())
        });
        let tables = threads.into_iter().flat_map(|thread| thread.join()).collect();
        drop(world);
        if let Some(removal) = removal {
            removal.join().map_err(|_| anyhow::anyhow!("the removal panicked"))??;
            table.count("removal beside threads", 0);
        }
        Ok(tables)
    })?;
    tables.into_iter().for_each(|one| table.append(one));
    if removal.is_some() {
        mdev_type.create(mdev.uuid)?;
    }
    stock.world(mdev)?.works()?;
    for _ in 0..CROWDS {
        let mut client = Client::start(mdev, stock.backend, rng.next(), How::Crowd)?;
        thread::sleep(Duration::from_millis(rng.below(100)));
        client.kill()?;
        table.count(client::entry(How::Crowd), 0);
    }
    stock.world(mdev)?.works()
}
