// SPDX-License-Identifier: GPL-2.0-only

use crate::{Error, Result, Vmm, wire::Message};
use std::{io::Read, os::unix::net::UnixStream};
use vfio_client::MigState;
use vm_memory::ReadVolatile;

/// Takes over the machine that comes by `connection`. It doesn't run then, until [`Vmm::run`].
///
/// `vmm` has the same memory and devices as what comes. If that fails, they are as after a reset, and their
/// memory has anything.
pub fn receive(vmm: &Vmm, mut connection: UnixStream) -> Result<()> {
    let received = take_over(vmm, &mut connection);
    if received.is_err() {
        // Of RESUMING nothing else leads back, if the state wasn't complete.
        vmm.devices().iter().for_each(|device| device.reset());
    }
    received
}

fn take_over(vmm: &Vmm, connection: &mut UnixStream) -> Result<()> {
    vmm.set_states(MigState::Resuming)?;
    loop {
        match Message::read(connection)? {
            // Nothing else writes to memory: no device runs. A page may come several times, the last is
            // the one that counts.
            Message::Memory { address, length } => {
                connection.read_exact_volatile(&mut vmm.slice(address, length)?)?;
            }
            Message::DeviceData { device, length } => {
                let mut bytes = vec![0; length as usize];
                connection.read_exact(&mut bytes)?;
                let device = vmm.devices().get(device as usize);
                let device = device.ok_or_else(|| Error::Protocol("data of no device".into()))?;
                device.write_migration_data(&bytes)?;
            }
            Message::End => break,
            Message::Taken => return Err(Error::Protocol("an answer to nothing".into())),
        }
    }
    // Leaving RESUMING says whether the state is complete, and one that the device can take: only now the
    // source may know. It comes last, because the device may pin memory in it, or read it, so that
    // has to be there and mapped.
    vmm.set_states(MigState::Stop)?;
    Message::Taken.write(connection)
}
