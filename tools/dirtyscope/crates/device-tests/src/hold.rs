// SPDX-License-Identifier: GPL-2.0-only

//! `dirtyscope hold`: a process with pinned pages that a device writes to, for a scenario to kill.

use anyhow::Result;
use mdev_dma::{
    GeneratorConfig, MdevDma,
    sysfs::Mdev,
    uapi::{RUST_MDEV_DMA_GEN_DMA_RW, RUST_MDEV_DMA_GEN_PIN, RUST_MDEV_DMA_GEN_PINNED},
};
use std::{
    io::{Read, stdin},
    process::ExitCode,
    sync::Arc,
};
use uuid::Uuid;
use vfio_client::{
    Container, Group, MapArgs, Memory,
    uapi::{VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE},
};

/// Pin pages, have the device write to them, say so, and wait for the end of the input
#[derive(clap::Args)]
pub struct Arguments {
    /// The mediated device to pin them with
    device: Uuid,
    /// Bytes to pin
    bytes: u64,
}

/// Runs the command.
pub fn run(arguments: &Arguments) -> Result<ExitCode> {
    let node = Mdev { uuid: arguments.device }.node()?;
    let container = Container::new(Group::open(&node)?)?;
    let device = MdevDma::open(&container, &node)?;
    let size = arguments.bytes;
    let memory = Arc::new(Memory::new(size as usize)?);
    let flags = VFIO_DMA_MAP_FLAG_READ | VFIO_DMA_MAP_FLAG_WRITE;
    container.map(&MapArgs { memory: &memory, offset: 0, iova: 0, size, flags, argsz: None })?;
    container.dirty_start()?;
    let outcome = device.pin(0, size)?;
    let pins = device.pins()?;
    let mode = RUST_MDEV_DMA_GEN_PINNED | RUST_MDEV_DMA_GEN_DMA_RW | RUST_MDEV_DMA_GEN_PIN;
    device.start_generator(&GeneratorConfig {
        iova: 0,
        length: size,
        seed: 1,
        limit: 0,
        rate: 0,
        mode,
    })?;
    println!("{} {pins}", outcome.status);
    stdin().read_to_end(&mut Vec::new())?;
    Ok(ExitCode::SUCCESS)
}
