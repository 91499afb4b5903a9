// SPDX-License-Identifier: GPL-2.0-only

//! What a client does that means harm: one input each, made from a seed and a number.

use crate::{
    backend::Backend,
    calls::Call,
    rng::Rng,
    stream::{self, Change},
    world::{self, ERROR, IOVA, MAPPED, RUNNING, RUNNING_P2P, SAVED, Spot, World},
};
use anyhow::{Context as _, Result, bail, ensure};
use mdev_dma::{GeneratorConfig, Opcode, PAGE, Width, sysfs::Mdev, uapi};
use std::{
    fmt, thread,
    time::{Duration, Instant},
};
use vfio_client::{
    EventFd,
    hostile::{Answer, Ground, HostileFile},
};

/// Kinds of inputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Ioctls,
    Regions,
    Registers,
    States,
    Signals,
    Files,
    Descriptors,
    Kills,
    Removals,
    Served,
    Listings,
    Threads,
}

impl Kind {
    pub const ALL: [Self; 12] = [
        Self::Ioctls,
        Self::Regions,
        Self::Registers,
        Self::States,
        Self::Signals,
        Self::Files,
        Self::Descriptors,
        Self::Kills,
        Self::Removals,
        Self::Served,
        Self::Listings,
        Self::Threads,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Ioctls => "ioctls",
            Self::Regions => "regions",
            Self::Registers => "registers",
            Self::States => "states",
            Self::Signals => "signals",
            Self::Files => "files",
            Self::Descriptors => "descriptors",
            Self::Kills => "kills",
            Self::Removals => "removals",
            Self::Served => "served",
            Self::Listings => "listings",
            Self::Threads => "threads",
        }
    }

    pub fn about(self) -> &'static str {
        match self {
            Self::Ioctls => "every ioctl with bad numbers, sizes, flags and pointers",
            Self::Regions => "reads and writes at every offset and width, and faulting buffers",
            Self::Registers => "every register at every boundary before every command",
            Self::States => "state streams changed field by field, with the right checksum",
            Self::Signals => "valid states and pins while signals come that end nobody",
            Self::Files => "two readers or writers of a data file, against states, reset and close",
            Self::Descriptors => "states that want a file when no more can be opened",
            Self::Kills => {
                "clients killed in the midst of it, also forked, exec'd, shared and poor ones"
            }
            Self::Removals => {
                "the device removed and the driver unloaded while something is in use"
            }
            Self::Served => {
                "memory that the client serves late, or not until it is reset or closed"
            }
            Self::Listings => "sysfs read as mdevctl list does while devices come and go",
            Self::Threads => "all of it from eight threads at once",
        }
    }

    /// Inputs a run, and those that one world sees.
    pub fn counts(self) -> (u64, u64) {
        match self {
            Self::Ioctls => (60_000, 200),
            Self::Regions => (50_000, 500),
            Self::Registers => (10_000, 100),
            Self::States => (10_000, 50),
            Self::Signals => (100, 10),
            Self::Files => (200, 20),
            Self::Descriptors => (200, 20),
            Self::Kills | Self::Removals | Self::Served => (200, 10),
            Self::Listings => (10, 2),
            Self::Threads => (10, 1),
        }
    }
}

/// One input.
pub enum Input {
    Call(Call),
    Transfer(Transfer),
    Command(Command),
    Stream(Stream),
    /// One that has a world of its own.
    Life(Kind, Rng),
}

/// A read or write of the device's file.
pub struct Transfer {
    write: bool,
    offset: u64,
    len: usize,
    buffer: Spot,
    contents: u64,
}

/// Registers, and what is rung then.
pub struct Command {
    registers: Vec<(u32, Width, u64)>,
    doorbell: (u32, u32),
}

/// A state to load.
pub struct Stream {
    base: usize,
    changes: Vec<Change>,
    /// Bytes of a write.
    chunk: usize,
    /// The state to go to from RESUMING.
    target: u32,
}

/// What came of an input.
pub struct Outcome {
    pub entry: String,
    /// Nothing if it was not made.
    pub errno: Option<i32>,
    /// Whether it passes what is checked first.
    pub passes: bool,
}

/// What inputs need besides a world: made once.
pub struct Stock {
    /// Of worlds that are made.
    pub backend: Backend,
    pub ground: &'static Ground,
    pub eventfd: HostileFile,
    /// Others for further threads.
    pub grounds: Vec<&'static Ground>,
    /// Valid state streams.
    pub streams: Vec<Vec<u8>>,
}

const REGISTERS: [(u32, Width); 10] = [
    (uapi::RUST_MDEV_DMA_REG_IOVA, Width::Quad),
    (uapi::RUST_MDEV_DMA_REG_LENGTH, Width::Quad),
    (uapi::RUST_MDEV_DMA_REG_SEED, Width::Quad),
    (uapi::RUST_MDEV_DMA_REG_GEN_IOVA, Width::Quad),
    (uapi::RUST_MDEV_DMA_REG_GEN_LENGTH, Width::Quad),
    (uapi::RUST_MDEV_DMA_REG_GEN_SEED, Width::Quad),
    (uapi::RUST_MDEV_DMA_REG_GEN_LIMIT, Width::Quad),
    (uapi::RUST_MDEV_DMA_REG_GEN_RATE, Width::Long),
    (uapi::RUST_MDEV_DMA_REG_GEN_MODE, Width::Long),
    (uapi::RUST_MDEV_DMA_REG_IRQ_ENABLE, Width::Long),
];

impl Input {
    /// Input `number` of a seed.
    pub fn new(kind: Kind, seed: u64, number: u64) -> Self {
        let mut rng = Rng::new(seed, kind.name(), number);
        let rng = &mut rng;
        match kind {
            Kind::Ioctls => Self::Call(Call::random(rng)),
            Kind::Regions => Self::Transfer(Transfer::new(rng, number)),
            Kind::Registers => Self::Command(Command::new(rng, number)),
            Kind::States => Self::Stream(Stream::new(rng, number)),
            _ => Self::Life(kind, rng.clone()),
        }
    }

    /// Does it.
    pub fn run(&self, world: &mut World, stock: &Stock) -> Result<Outcome> {
        match self {
            Self::Call(call) => {
                let answer = call.make(world, &stock.eventfd);
                let done = matches!(answer, Some(Answer::Done(_)));
                ensure!(!done || !call.must_fail(), "it must fail, and succeeds");
                let errno = answer.as_ref().and_then(Answer::errno);
                // The device once more is closed, a data file is used.
                if let Some(Answer::Opened(file)) = answer.filter(|_| call.name == "FEATURE") {
                    world.data.push(file);
                    if world.data.len() > 8 {
                        world.data.remove(0);
                    }
                }
                Ok(Outcome { entry: call.name.into(), errno, passes: call.passes })
            }
            Self::Transfer(transfer) => transfer.run(world),
            Self::Command(command) => command.run(world),
            Self::Stream(stream) => stream.run(world, stock),
            Self::Life(kind, _) => bail!("{} have a world of their own", kind.name()),
        }
    }
}

impl Transfer {
    fn new(rng: &mut Rng, number: u64) -> Self {
        const OFFSETS: u64 = 4096 + 16;
        let index = number / 2;
        // Every offset in turn with every width, and between these any.
        let (region, within, len) = match number % 2 {
            0 => (0, index % OFFSETS, rng.pick(&[0, 1, 2, 2, 3, 4, 4, 5, 7, 8, 8, 9])),
            _ => {
                let region = rng.pick(&[0, 0, 7, 7, 7, 1, 6, 8, 9, 255, 0x7f_ffff]);
                let within = match region {
                    7 => rng.below(260),
                    _ => rng.u64(&[4096, 256, 1 << 40]) & ((1 << 40) - 1),
                };
                let len = match rng.below(3) {
                    0 => rng.below(10),
                    1 => rng.pick(&[255, 256, 257, 4096, 4097]),
                    _ => rng.u64(&[8, 256]),
                };
                (region, within, len)
            }
        };
        let buffer = match rng.below(8) {
            0 => rng.pick(&Spot::BAD),
            1 => Spot::BeforeReadOnly(rng.below(9)),
            2 => Spot::BeforeEnd(rng.below(9)),
            _ => Spot::Buffer(rng.below(8)),
        };
        let offset = if rng.one_in(64) { rng.u64(&[1 << 40]) } else { (region << 40) + within };
        let contents = rng.u64(&[IOVA, PAGE]);
        Self { write: rng.one_in(2), offset, len: len as usize, buffer, contents }
    }

    fn run(&self, world: &World) -> Result<Outcome> {
        let &Self { write, offset, len, buffer, contents } = self;
        let at = world.address(buffer);
        let answer = if write {
            if let Spot::Buffer(offset) = buffer {
                let at = world.address(Spot::Buffer(offset)) - world.ground.address(0);
                world.ground.memory().write(at as usize, &contents.to_le_bytes());
            }
            world.file().write(world.ground, at, len, Some(offset))
        } else {
            world.file().read(world.ground, at, len, Some(offset))
        };
        let within = offset & ((1 << 40) - 1);
        let aligned = matches!(len, 1 | 2 | 4 | 8) && within % len as u64 == 0;
        let (region, passes) = match offset >> 40 {
            0 => ("BAR 0", aligned && within + len as u64 <= 4096),
            7 => ("config", within < 256),
            _ => ("other region", false),
        };
        let what = if write { "write" } else { "read" };
        let (entry, errno) = (format!("{what} {region}"), answer.errno());
        // Beyond its end configuration space is cut. More than this the kernel refuses by itself.
        let cut = region == "config" && passes && len <= i32::MAX as usize;
        ensure!(!cut || errno != Some(EINVAL), "{entry} of {len:#x} bytes at {within:#x}: EINVAL");
        Ok(Outcome { entry, errno, passes })
    }
}

impl Command {
    fn new(rng: &mut Rng, number: u64) -> Self {
        let limits = stream::limits(IOVA, MAPPED);
        let doorbells = 16;
        let count = REGISTERS.len() as u64;
        let mode = 1 + rng.below(7);
        let rate = rng.pick(&[0, 1, 1000]);
        let good = [
            IOVA + rng.below(8) * PAGE,
            (1 + rng.below(8)) * PAGE,
            rng.next(),
            IOVA,
            MAPPED * PAGE,
            rng.next(),
            rng.below(64),
            rate,
            mode,
            rng.below(4),
        ];
        let mut registers: Vec<_> =
            REGISTERS.iter().zip(good).map(|(&(at, width), value)| (at, width, value)).collect();
        // Each in turn has a boundary, and from time to time another one, too.
        registers[(number % count) as usize].2 = rng.u64(&limits);
        if rng.one_in(3) {
            let other = rng.below(count) as usize;
            registers[other].2 = rng.u64(&limits);
        }
        let doorbell = match number / count % doorbells {
            op @ 0..12 => {
                let background = if rng.one_in(2) { 1 << 31 } else { 0 };
                (uapi::RUST_MDEV_DMA_REG_COMMAND, op as u32 | background)
            }
            12 => (uapi::RUST_MDEV_DMA_REG_COMMAND, rng.u32(&[11])),
            13 => (uapi::RUST_MDEV_DMA_REG_GEN_CONTROL, rng.u32(&[2])),
            n => (uapi::RUST_MDEV_DMA_REG_GEN_CONTROL, n as u32 - 13),
        };
        Self { registers, doorbell }
    }

    fn run(&self, world: &World) -> Result<Outcome> {
        for &(register, width, value) in &self.registers {
            world.device.write(register, width, value)?;
        }
        let (register, value) = self.doorbell;
        world.device.write(register, Width::Long, value.into())?;
        let (entry, errno) = if register == uapi::RUST_MDEV_DMA_REG_COMMAND {
            let name = Opcode::from_number(value & !(1 << 31))
                .map_or_else(|| "no command".into(), |op| format!("command {op}"));
            // One in the background blocks others: the device is to be busy, too, but not for long.
            (name, world.device.wait(world.patience)?.status)
        } else {
            ("generator".into(), world.device.generator()?.status)
        };
        ensure!(errno < 4096, "{entry}: status {errno} is no errno");
        Ok(Outcome { entry, errno: Some(errno as i32), passes: true })
    }
}

/// Looks at a device that runs a state: what is slow isn't waited for.
const MOMENT: usize = 20;

const EINVAL: i32 = 22;

/// Threads that share a world.
const THREADS: usize = 8;

/// Devices whose states are saved.
const BASES: usize = 4;

impl Stream {
    /// First, whatever the seed is, each number of each base at each boundary.
    fn new(rng: &mut Rng, number: u64) -> Self {
        let bases = BASES as u64;
        if let Some(change) = stream::number_at_boundary(number / bases) {
            let base = (number % bases) as usize;
            return Self { base, changes: vec![change], chunk: SAVED, target: RUNNING };
        }
        Self {
            base: rng.below(bases) as usize,
            changes: stream::changes(rng, IOVA, MAPPED),
            chunk: rng.pick(&[SAVED, SAVED, SAVED, 100, 7]),
            // RUNNING, most often.
            target: rng.pick(&[2, 2, 2, 1, 5, 3]),
        }
    }

    fn run(&self, world: &mut World, stock: &Stock) -> Result<Outcome> {
        let base = stock.streams.get(self.base).context("no such stream")?;
        let stream = stream::apply(base, &self.changes);
        world.data.clear();
        let written = world.write_state(&stream, self.chunk)?;
        let loaded = world.set_state(self.target);
        let passes = stream::passes_first_gate(&self.changes);
        if loaded.is_ok() {
            ensure!(
                stream::generator_is_valid(&stream),
                "START refuses the generator of what is taken"
            );
            run_a_moment(world, stream::generator_hurries(&stream))?;
        } else {
            let state = world.state()?;
            ensure!(matches!(state, 0 | 4), "a state that was refused leaves state {state}");
            if state == ERROR {
                let left = world.set_state(self.target);
                ensure!(left == Err(EINVAL), "ERROR is left for {}: {left:?}", self.target);
            }
            let pins = world.device.pins()?;
            ensure!(pins == 0, "a state that was refused leaves {pins} pins");
        }
        let errno = written.and(loaded).err().unwrap_or(0);
        world.data.clear();
        world.works()?;
        ensure!(world.state()? == RUNNING, "it isn't RUNNING");
        Ok(Outcome { entry: "state stream".into(), errno: Some(errno), passes })
    }
}

/// Lets a device run that has taken over a state, and do what it does; and saves that again. What `hurries`
/// has a generator that is to write at once.
fn run_a_moment(world: &mut World, hurries: bool) -> Result<()> {
    let before = world.device.generator()?;
    if let Err(errno) = world.set_state(RUNNING) {
        bail!("to RUNNING with a state that was accepted: errno {errno}");
    }
    // What it took over runs in the background: some of it before it is asked for more.
    let begin = Instant::now();
    for n in 0.. {
        let now = world.device.generator()?;
        let waits = world.device.outcome()?.is_in_progress();
        let written = !now.is_running() || now.counter != before.counter;
        if written && !waits || (written || !hurries) && n >= MOMENT {
            break;
        }
        ensure!(begin.elapsed() < world.patience, "the generator doesn't write: {now:?}");
        thread::sleep(Duration::from_micros(50));
    }
    world.device.write(uapi::RUST_MDEV_DMA_REG_COMMAND, Width::Long, Opcode::DmaRead as u64)?;
    world.device.generator()?;
    world.device.pins()?;
    world.save().map(drop)
}

impl Stock {
    /// Without what takes a device to make.
    pub fn without_streams() -> Result<Self> {
        let (ground, eventfd) = (world::ground()?, EventFd::new()?.into());
        let (grounds, streams) = (Vec::new(), Vec::new());
        Ok(Self { backend: Backend::Type1, ground, eventfd, grounds, streams })
    }

    /// A world with a device that nobody has open.
    pub fn world(&self, mdev: Mdev) -> Result<World> {
        World::new(mdev, self.backend, self.ground)
    }

    /// With streams of a device that nobody has open.
    pub fn new(mdev: Mdev) -> Result<Self> {
        let this = Self::without_streams()?;
        let grounds = (0..THREADS).map(|_| world::ground()).collect::<Result<_>>()?;
        let mut streams = Vec::new();
        for base in 0..BASES {
            let mut world = this.world(mdev)?;
            set_up(&mut world, base)?;
            streams.push(world.save()?);
        }
        Ok(Self { grounds, streams, ..this })
    }
}

/// Makes a device worth saving: with nothing, with pins, with a generator, with a command that waits, too.
fn set_up(world: &mut World, base: usize) -> Result<()> {
    let device = &world.device;
    let ok = |what: &str, outcome: mdev_dma::Outcome| {
        ensure!(outcome.status == 0, "{what}: status {}", outcome.status);
        Ok(())
    };
    if base > 0 {
        ok("PIN", device.pin(IOVA, 8 * PAGE)?)?;
        ok("PIN", device.pin(IOVA + 2 * PAGE, 2 * PAGE)?)?;
    }
    if base > 1 {
        let (length, mode) =
            (8 * PAGE, uapi::RUST_MDEV_DMA_GEN_PINNED | uapi::RUST_MDEV_DMA_GEN_DMA_RW);
        let config = GeneratorConfig {
            iova: IOVA,
            length,
            seed: 9,
            limit: 0,
            rate: [0, 1000][base % 2],
            mode,
        };
        device.start_generator(&config)?;
    }
    if base > 2 {
        if let Err(errno) = world.set_state(RUNNING_P2P) {
            bail!("RUNNING_P2P: errno {errno}");
        }
        world.device.run_in_background(Opcode::DmaWrite, IOVA, 2 * PAGE, 3)?;
    }
    Ok(())
}

impl fmt::Display for Input {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Call(call) => call.fmt(f),
            Self::Life(..) => Ok(()),
            Self::Transfer(Transfer { write, offset, len, buffer, contents }) => {
                let what = if *write { "write" } else { "read" };
                write!(f, "{what} {len:#x} bytes at {offset:#x}, {buffer}, {contents:#x}")
            }
            Self::Command(Command { registers, doorbell }) => {
                for (register, _, value) in registers {
                    write!(f, "{register:#x}={value:#x} ")?;
                }
                write!(f, "{:#x}={:#x}", doorbell.0, doorbell.1)
            }
            Self::Stream(Stream { base, changes, chunk, target }) => {
                write!(f, "stream {base}")?;
                for change in changes {
                    write!(f, " {change}")?;
                }
                write!(f, ", by {chunk} bytes, to state {target}")
            }
        }
    }
}
