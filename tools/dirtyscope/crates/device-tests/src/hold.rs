// SPDX-License-Identifier: GPL-2.0-only

//! `dirtyscope hold`: a process that has a device do something, for a scenario to kill.

use anyhow::{Context as _, Result};
use harness::{FuseServer, unserved_memory};
use mdev_dma::{
    GeneratorConfig, MdevDma, Opcode, PAGE,
    sysfs::Mdev,
    uapi::{
        RUST_MDEV_DMA_COMMAND_BACKGROUND, RUST_MDEV_DMA_GEN_DMA_RW, RUST_MDEV_DMA_GEN_PIN,
        RUST_MDEV_DMA_GEN_PINNED,
    },
};
use rustix::process::{Signal, set_parent_process_death_signal};
use std::{
    io::{Read, stdin},
    process::ExitCode,
    sync::Arc,
    thread,
    time::Duration,
};
use testbed::fixture::is_awaited;
use uuid::Uuid;
use vfio_client::{
    Container, Group, MapArgs, Memory, MigState,
    uapi::{VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE},
};

/// Have a device do something, say so, and wait for the end of the input
#[derive(clap::Args)]
pub struct Arguments {
    /// The mediated device
    device: Uuid,
    /// Bytes of memory
    bytes: u64,
    /// What it does
    #[arg(long, value_enum, default_value_t = What::Pinned)]
    what: What,
}

/// What is under way.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum What {
    /// All memory is pinned, and the generator writes to it.
    Pinned,
    /// A command waits for memory that this process serves, and doesn't.
    Foreground,
    /// So does one in the background.
    Background,
    /// The device is to be quiesced while one does.
    Quiesce,
    /// A register is read while the generator waits for such memory.
    Access,
    /// States with many pins are loaded, one after the other.
    Load,
    /// PIN in the background waits for memory that this process serves by FUSE, and doesn't.
    Fuse,
}

/// The time in which a system call comes to wait for what is waited for already.
const A_WHILE: Duration = Duration::from_millis(20);

/// Runs the command.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    set_parent_process_death_signal(Some(Signal::KILL)).context("prctl PR_SET_PDEATHSIG")?;
    let size = arguments.bytes;
    // What is opened first is closed first if the process is killed: here, the device, which waits.
    let (server, memory) = match arguments.what {
        What::Fuse => {
            let server = FuseServer::new(size)?;
            let memory = unserved_memory(server.directory(), size)?;
            (Some(server), memory)
        }
        _ => (None, Memory::new(size as usize)?),
    };
    let node = Mdev { uuid: arguments.device }.node()?;
    let container = Container::new(Group::open(&node)?)?;
    let device = MdevDma::open(&container, &node)?;
    let memory = Arc::new(memory);
    let flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE;
    container.map(&MapArgs { memory: &memory, offset: 0, iova: 0, size, flags, argsz: None })?;
    match arguments.what {
        What::Pinned => hold_pins(&container, &device, size)?,
        What::Load => load(&device, size)?,
        What::Fuse => wait_for_fuse(&device, size, &server.context("no server")?)?,
        what => wait(&device, &memory, what)?,
    }
    Ok(ExitCode::SUCCESS)
}

/// Says that all is as it should be, and waits.
fn ready(text: &str) -> Result<()> {
    println!("{text}");
    stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

fn generator(length: u64, mode: u32) -> GeneratorConfig {
    GeneratorConfig { iova: 0, length, seed: 1, limit: 0, rate: 0, mode }
}

fn hold_pins(container: &Container, device: &MdevDma, size: u64) -> Result<()> {
    container.dirty_start()?;
    let outcome = device.pin(0, size)?;
    let pins = device.pins()?;
    let mode = RUST_MDEV_DMA_GEN_PINNED | RUST_MDEV_DMA_GEN_DMA_RW | RUST_MDEV_DMA_GEN_PIN;
    device.start_generator(&generator(size, mode))?;
    ready(&format!("{} {pins}", outcome.status))
}

fn load(device: &MdevDma, size: u64) -> Result<()> {
    device.pin(0, size)?;
    let set = |state| device.device().set_migration_state(state);
    let stream = set(MigState::StopCopy)?.context("no data")?.read_to_end(1 << 16)?;
    for n in 0.. {
        set(MigState::Resuming)?.context("no data")?.write(&stream)?;
        if n == 1 {
            println!("{}", device.pins()?);
        }
        set(MigState::Stop)?;
    }
    Ok(())
}

fn wait_for_fuse(device: &MdevDma, size: u64, server: &FuseServer) -> Result<()> {
    device.run_in_background(Opcode::Pin, 0, size, 1)?;
    server.wait_until_asked()?;
    ready(&server.directory().to_string_lossy())
}

fn wait(device: &MdevDma, memory: &Memory, what: What) -> Result<()> {
    let waits = memory.unserved()?;
    thread::scope(|scope| {
        let command = |background| {
            let length = memory.len() as u64;
            device.run(Opcode::DmaWrite as u32 | background, 0, length, 1)
        };
        match what {
            What::Access => device.start_generator(&generator(PAGE, RUST_MDEV_DMA_GEN_DMA_RW))?,
            What::Foreground => drop(scope.spawn(move || command(0))),
            // A driver may have completed it only when this returns.
            _ => drop(scope.spawn(move || command(RUST_MDEV_DMA_COMMAND_BACKGROUND))),
        }
        is_awaited(&waits)?;
        match what {
            What::Quiesce => {
                drop(scope.spawn(|| device.device().set_migration_state(MigState::Stop)));
            }
            What::Access => drop(scope.spawn(|| device.generator())),
            _ => (),
        }
        thread::sleep(A_WHILE);
        ready("it waits")
    })
}
