// SPDX-License-Identifier: GPL-2.0-only

//! Clients that serve their memory themselves (userfaultfd): late, or not until something that waits for
//! it was to end.

use crate::{
    input::{Input, Kind, Stock},
    rng::Rng,
    table::Table,
    world::{self, IOVA, MAPPED, RUNNING, STOP_COPY, Spot},
};
use anyhow::{Result, anyhow, ensure};
use mdev_dma::{GeneratorConfig, Opcode, PAGE, sysfs::Mdev, uapi};
use std::{
    thread,
    time::{Duration, Instant},
};

/// What takes longer is broken.
const LONG: Duration = Duration::from_secs(20);

/// Inputs while memory is served late.
const INPUTS: u64 = 40;

/// Lives one.
pub fn live(rng: &mut Rng, mdev: Mdev, stock: &Stock, table: &mut Table) -> Result<()> {
    match rng.below(4) {
        0 => late(rng, mdev, stock, table)?,
        1 => unserved_buffer(rng, mdev, stock, table)?,
        _ => unserved(rng, mdev, stock, table)?,
    }
    stock.world(mdev)?.works()
}

/// Commands and generators of all kinds, while the device's memory comes late, and goes again.
fn late(rng: &mut Rng, mdev: Mdev, stock: &Stock, table: &mut Table) -> Result<()> {
    let mut world = stock.world(mdev)?;
    let memory = world.ground.memory();
    let served = memory.unserved_in(world::device_pages())?;
    let served = served.serve(Duration::from_micros(rng.below(300)));
    let seed = rng.next();
    for n in 0..INPUTS {
        if n % 8 == 0 {
            memory.discard(world::device_pages())?;
        }
        // Any register, and any command.
        let input = Input::new(Kind::Registers, seed, rng.below(1 << 32));
        table.add(&input.run(&mut world, stock)?);
    }
    world.reset()?;
    drop(served);
    world.works()
}

/// A command or the generator waits for memory for good: it ends with the device, or once it is served.
fn unserved(rng: &mut Rng, mdev: Mdev, stock: &Stock, table: &mut Table) -> Result<()> {
    let mut world = stock.world(mdev)?;
    let memory = world.ground.memory();
    memory.discard(world::device_pages())?;
    let waits = memory.unserved_in(world::device_pages())?;
    if rng.one_in(2) {
        let mode = uapi::RUST_MDEV_DMA_GEN_DMA_RW;
        let length = MAPPED * PAGE;
        let config = GeneratorConfig { iova: IOVA, length, seed: 1, limit: 0, rate: 0, mode };
        world.device.start_generator(&config)?;
    } else {
        let op = rng.pick(&[Opcode::DmaWrite, Opcode::DmaRead]);
        world.device.run_in_background(op, IOVA, MAPPED * PAGE, 1)?;
    }
    ensure!(waits.is_awaited(LONG)?, "nothing waits for the memory of a device");
    let begin = Instant::now();
    let how = rng.below(4);
    match how {
        0 => world.reset()?,
        1 => drop(world),
        // These wait for it, as they say.
        _ => thread::scope(|scope| -> Result<()> {
            let moment = Duration::from_micros(rng.below(3000));
            let ending = scope.spawn(move || match how {
                2 => world.set_state(STOP_COPY).map_err(|errno| anyhow!("STOP_COPY: {errno}")),
                _ => world.container.unmap(),
            });
            thread::sleep(moment);
            drop(waits);
            ending.join().map_err(|_| anyhow!("a thread panicked"))?
        })?,
    }
    let took = begin.elapsed();
    ensure!(took < LONG, "what waits for memory that isn't served ended after {took:?}");
    table.count(["RESET", "close", "STOP", "unmap"].map(entry)[how as usize], 0);
    Ok(())
}

fn entry(end: &str) -> &'static str {
    match end {
        "RESET" => "unserved until RESET",
        "close" => "unserved until close",
        "STOP" => "unserved beside STOP",
        _ => "unserved beside unmap",
    }
}

/// A call's own buffer isn't served: it waits, and nobody else does.
fn unserved_buffer(rng: &mut Rng, mdev: Mdev, stock: &Stock, table: &mut Table) -> Result<()> {
    let mut world = stock.world(mdev)?;
    let other = world.share(stock.grounds[0])?;
    let ground = stock.grounds[0];
    let at = world::address(ground, Spot::Buffer(0));
    let buffer = (at - ground.address(0)) as usize;
    let page = buffer..buffer + PAGE as usize;
    ground.memory().discard(page.clone())?;
    let waits = ground.memory().unserved_in(page)?;
    let (writes, offset) = (rng.one_in(2), rng.below(8) * 8);
    thread::scope(|scope| -> Result<()> {
        let transfer = scope.spawn(|| match writes {
            true => other.file().write(ground, at, 8, Some(offset)),
            false => other.file().read(ground, at, 8, Some(offset)),
        });
        ensure!(waits.is_awaited(LONG)?, "nothing waits for a buffer");
        let begin = Instant::now();
        world.works()?;
        let stopped = world.set_state(STOP_COPY).and_then(|()| world.set_state(RUNNING));
        ensure!(stopped.is_ok(), "to STOP_COPY and RUNNING: {stopped:?}");
        ensure!(begin.elapsed() < LONG, "others wait for a buffer of a call");
        drop(waits);
        let answer = transfer.join().map_err(|_| anyhow!("a thread panicked"))?;
        let errno = answer.errno().unwrap_or(-1);
        table.count("unserved buffer", errno);
        Ok(())
    })
}
