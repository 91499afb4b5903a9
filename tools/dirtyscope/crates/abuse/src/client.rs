// SPDX-License-Identifier: GPL-2.0-only

//! A process that has a device and does anything, until it is killed.

use crate::{
    backend::Backend,
    input::{Input, Kind, Stock},
    rng::Rng,
    world::{IOVA, MAPPED, Registers, World, ground},
};
use anyhow::{Context as _, Result, ensure};
use harness::worker;
use mdev_dma::{GeneratorConfig, MdevDma, Opcode, PAGE, sysfs::Mdev};
use rustix::process::{Resource, Rlimit, Signal, set_parent_process_death_signal, setrlimit};
use std::{
    env, fs,
    io::{BufRead, BufReader, Write, stdin, stdout},
    os::{
        fd::{AsFd, OwnedFd},
        unix::{fs::PermissionsExt, process::CommandExt},
    },
    path::Path,
    process::{Child, ChildStdout, Command, ExitCode, Stdio},
    thread,
};
use uuid::Uuid;
use vfio_client::Fork;

/// What is special about a client.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum How {
    /// Nothing.
    Busy,
    /// A fork of it has all its files, too.
    Forks,
    /// It becomes another program while its device is busy.
    Execs,
    /// Another process, which isn't the mapper, has its device, too.
    Shares,
    /// It is no privileged user, and has little memory that it may lock.
    Poor,
    /// It is in a cgroup with little memory.
    Small,
    /// It has many threads, which do anything: a type1 without our fixes doesn't stand that.
    Crowd,
}

impl How {
    /// Those that any type1 stands.
    pub const ALL: [Self; 6] =
        [Self::Busy, Self::Forks, Self::Execs, Self::Shares, Self::Poor, Self::Small];
}

/// What its end is called in the table.
pub fn entry(how: How) -> &'static str {
    match how {
        How::Busy => "kill",
        How::Forks => "kill with a fork",
        How::Execs => "kill after exec",
        How::Shares => "kill beside another",
        How::Poor => "kill unprivileged",
        How::Small => "kill in a cgroup",
        How::Crowd => "kill of 8 threads",
    }
}

/// Be such a client
#[derive(clap::Args)]
pub struct ClientArguments {
    #[arg(long)]
    device: Uuid,
    #[arg(long)]
    seed: u64,
    #[arg(long, value_enum)]
    backend: Backend,
    #[arg(long, value_enum)]
    how: How,
    /// It has the device as its input
    #[arg(long)]
    visitor: bool,
}

/// Threads of a crowd.
const THREADS: u64 = 8;

/// A user who has no rights.
const NOBODY: u32 = 65534;

/// Bytes that such a user may lock.
const LOCKED: u64 = 8 * PAGE;

/// A cgroup with little memory, where there are cgroups.
const CGROUP: &str = "/sys/fs/cgroup/abuse";

/// A client, by another process.
pub struct Client(Child);

impl Client {
    /// Starts one. Returns when it has its device.
    pub fn start(mdev: Mdev, backend: Backend, seed: u64, how: How) -> Result<Self> {
        let mut command = command(mdev.uuid, backend, seed, how)?;
        if how == How::Poor {
            for path in backend.paths(mdev)? {
                let what = || path.display().to_string();
                fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).with_context(what)?;
            }
            command.uid(NOBODY).gid(NOBODY);
        }
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn()?;
        let out = child.stdout.take();
        let client = Self(child);
        let ready = read_ready(out)?;
        // One that the kernel has killed for its memory has said nothing, either.
        ensure!(ready || how == How::Small, "a client ended without having begun");
        Ok(client)
    }

    /// Kills it, and waits for its end.
    pub fn kill(&mut self) -> Result<()> {
        self.0.kill()?;
        self.0.wait()?;
        Ok(())
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

fn command(device: Uuid, backend: Backend, seed: u64, how: How) -> Result<Command> {
    let mut command = Command::new(env::current_exe()?);
    let backend = format!("{backend:?}").to_lowercase();
    let how = format!("{how:?}").to_lowercase();
    let (device, seed) = (device.to_string(), seed.to_string());
    command.args(["abuse-client", "--device", &device, "--seed", &seed]);
    command.args(["--backend", &backend, "--how", &how]);
    command.env_remove(worker::JOB);
    Ok(command)
}

/// Runs the command.
pub fn run(arguments: &ClientArguments) -> Result<ExitCode> {
    set_parent_process_death_signal(Some(Signal::KILL)).context("prctl PR_SET_PDEATHSIG")?;
    if arguments.visitor {
        return visit(arguments);
    }
    match arguments.how {
        How::Poor => {
            let limit = Rlimit { current: Some(LOCKED), maximum: Some(LOCKED) };
            setrlimit(Resource::Memlock, limit).context("RLIMIT_MEMLOCK")?;
        }
        How::Small if Path::new(CGROUP).exists() => {
            let pid = std::process::id().to_string();
            fs::write(format!("{CGROUP}/cgroup.procs"), pid).context(CGROUP)?;
        }
        _ => (),
    }
    let mdev = Mdev { uuid: arguments.device };
    let stock = Stock::without_streams()?;
    let mut world = World::new(mdev, arguments.backend, stock.ground)?;
    let config =
        GeneratorConfig { iova: IOVA, length: MAPPED * PAGE, seed: 1, limit: 0, rate: 0, mode: 6 };
    world.device.start_generator(&config)?;
    world.device.run_in_background(Opcode::Pin, IOVA, MAPPED / 2 * PAGE, 0)?;
    let _fork = if arguments.how == How::Forks { Some(Fork::new()?) } else { None };
    if arguments.how == How::Shares {
        let device: OwnedFd = world.file().duplicate()?.into();
        let mut command =
            command(arguments.device, arguments.backend, arguments.seed, arguments.how)?;
        let child = command.arg("--visitor").stdin(device).stdout(Stdio::piped()).spawn()?;
        // From now on it doesn't survive us.
        read_ready(child.stdout)?;
    }
    say_ready()?;
    if arguments.how == How::Execs {
        // Only returns if it fails.
        return Err(Command::new("sleep").arg("100").exec().into());
    }
    if arguments.how == How::Crowd {
        for n in 1..THREADS {
            let mut world = world.share(ground()?)?;
            let (seed, stock) = (arguments.seed, Stock::without_streams()?);
            thread::spawn(move || does_anything(&mut world, &stock, seed, n));
        }
    }
    does_anything(&mut world, &stock, arguments.seed, 0)
}

fn does_anything(world: &mut World, stock: &Stock, seed: u64, thread: u64) -> ! {
    let mut rng = Rng::new(seed, "client", thread);
    loop {
        let kind = rng.pick(&[Kind::Ioctls, Kind::Registers]);
        let input = Input::new(kind, seed, rng.next());
        // What it can't do any more is nobody's business: it isn't told from what it has broken.
        let _ = input.run(world, stock);
    }
}

/// Uses a device that another process has opened, whose memory it is.
fn visit(arguments: &ClientArguments) -> Result<ExitCode> {
    let file = stdin().as_fd().try_clone_to_owned()?.into();
    let device = MdevDma::new(Registers::new(file, ground()?));
    let mut rng = Rng::new(arguments.seed, "visitor", 0);
    say_ready()?;
    loop {
        let command = rng.below(12) as u32 | if rng.one_in(2) { 1 << 31 } else { 0 };
        let length = (1 + rng.below(MAPPED)) * PAGE;
        let _ = device.run(command, IOVA + rng.below(4) * PAGE, length, 1);
    }
}

/// Waits until another process has said that it is ready, or has ended.
fn read_ready(out: Option<ChildStdout>) -> Result<bool> {
    let mut line = String::new();
    BufReader::new(out.context("no output")?).read_line(&mut line)?;
    Ok(!line.is_empty())
}

fn say_ready() -> Result<()> {
    let mut out = stdout().lock();
    writeln!(out, "ready")?;
    Ok(out.flush()?)
}
