"""Programs whose collectives, products and loops are known, compiled for eight CPU devices; other chips' spellings."""

import textwrap

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from rcm_jax.parallel import hlo
from rcm_jax.parallel.sharding import MeshConfig, make_mesh

F32 = 4  # bytes


def text_of(function, *shapes) -> str:
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(function).lower(*arrays).compile().as_text()


def over_fsdp(body):
    """body, on each of 2 × 4 devices, of x [8, 16] split over fsdp = 4."""
    mesh = make_mesh(MeshConfig(data=2, fsdp=4))
    return jax.shard_map(body, mesh=mesh, in_specs=P("fsdp"), out_specs=P("fsdp"), check_vma=False)


CALLS = {
    "all-gather": lambda x: jax.lax.all_gather(x, "fsdp", tiled=True)[:2],
    "reduce-scatter": lambda x: jnp.tile(jax.lax.psum_scatter(x.T, "fsdp", tiled=True).T, (1, 4)),
    "all-reduce": lambda x: jax.lax.psum(x, "fsdp"),
    "all-to-all": lambda x: jax.lax.all_to_all(x, "fsdp", 1, 1, tiled=True),
    "collective-permute": lambda x: jax.lax.ppermute(x, "fsdp", [(0, 1), (1, 0), (2, 3), (3, 2)]),
}


@pytest.mark.parametrize("kind", CALLS)
def test_a_collective_in_a_loop_counts_as_often_as_it_runs(kind):
    def body(x):
        return jax.lax.scan(lambda x, _: (jnp.sin(CALLS[kind](x)), None), x, None, length=7)[0]

    found = [c for c in hlo.read(text_of(over_fsdp(body), (8, 16))).collectives if c.kind == kind]
    assert sum(c.times * c.size for c in found) == 7 * 2 * 16 * F32  # the operand of one device
    assert {len(c.group) for c in found} == ({2} if kind == "collective-permute" else {4})


def test_products_in_nested_loops():
    def inner(x, w):
        return jnp.tanh(x @ w), None

    def outer(x, ws):
        return jax.lax.scan(inner, x, ws)[0], None

    work = hlo.read(text_of(lambda x, ws: jax.lax.scan(outer, x, ws)[0], (8, 16), (3, 5, 16, 16)))
    assert work.flops == 15 * 2 * 8 * 16 * 16
    assert work.open_loops == 0 and not work.kernels and not work.collectives
    assert work.largest[0].size == 5 * 16 * 16 * F32  # the matrices of one outer step


def test_a_loop_of_traced_length_counts_as_often_as_the_caller_says():
    def program(x, w, n):
        return jax.lax.fori_loop(0, n.astype(jnp.int32), lambda _, x: jnp.tanh(x @ w), x)

    text = text_of(program, (8, 16), (16, 16), ())
    assert hlo.read(text, 1.5).flops == 1.5 * hlo.read(text, 1.0).flops == 1.5 * 2 * 8 * 16 * 16
    assert hlo.read(text).open_loops == 1


def test_an_update_in_place_writes_no_more_than_the_update():
    def program(x):
        return jax.lax.scan(lambda carry, i: (carry.at[i].set(jnp.sin(carry[i])), None), x, jnp.arange(100))[0]

    assert 100 * 16 * F32 <= hlo.read(text_of(program, (100, 16))).written < 8 * 100 * 16 * F32


TPU = textwrap.dedent("""
    HloModule jit_run, is_scheduled=true

    %limit (p: (s32[], bf16[4,8])) -> pred[] {
      %c = s32[]{:T(128)} constant(40)
      %p = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) parameter(0)
      %i = s32[]{:T(128)} get-tuple-element(%p), index=0
      ROOT %lt = pred[]{:T(512)} compare(%i, %c), direction=LT
    }

    %body (q: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
      %q = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) parameter(0)
      %x = bf16[4,8]{1,0:T(8,128)(2,1)} get-tuple-element(%q), index=1
      %near = bf16[4,8]{1,0:T(8,128)(2,1)S(1)} negate(%x)
      %g = bf16[4,32]{1,0:T(8,128)(2,1)} all-gather(%near), replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={1}
      %kernel = bf16[4,8]{1,0:T(8,128)(2,1)} custom-call(%g), custom_call_target="tpu_custom_call", \
    backend_config={"custom_call_config":{"cost_estimate":{"flops":"1000","bytes_accessed":"5"}}}
      ROOT %t = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) tuple(%i, %kernel)
    }

    ENTRY %main (a: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
      %a = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) parameter(0)
      %l = bf16[8,40,512,128]{3,2,1,0} parameter(1)
      %r = bf16[8,40,256,128]{3,2,1,0} parameter(2)
      %s = f32[8,40,512,256]{3,2,1,0} convolution(%l, %r), window={size=8x40 stride=7x39 lhs_dilate=8x40}, \
    dim_labels=01bf_01oi->01bf, metadata={op_name="jit(run)/dot_general"}
      ROOT %w = (s32[]{:T(128)}, bf16[4,8]{1,0:T(8,128)(2,1)}) while(%a), condition=%limit, body=%body
    }
    """)


def test_a_program_for_tpus():
    work = hlo.read(TPU)
    product = 2 * 8 * 40 * 512 * 256 * 128  # a batch of 8 × 40
    assert work.flops == product + 40 * 1000 and not work.kernels
    assert work.collectives == (hlo.Collective("all-gather", 4 * 8 * 2, (0, 1, 2, 3), 40),)
    assert work.written == 8 * 40 * 512 * 256 * 4 + 40 * (4 * 32 + 4 * 8) * 2  # S(1) is not main memory
    assert work.largest[0].source == "jit(run)/dot_general"


GPU = textwrap.dedent("""
    HloModule jit_run, num_partitions=4

    ENTRY %main {
      %q = bf16[2,96,5,64]{3,2,1,0} parameter(0)
      %k = bf16[2,32,5,64]{3,2,1,0} parameter(1)
      %row = f32[2,5,96]{2,1,0} parameter(2)
      %a = bf16[64,48]{1,0} parameter(3)
      %gemm = (f32[64,16]{1,0}, s8[4096]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", \
    backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
      %call = CALL, custom_call_target="triton_kernel_call"
      ROOT %sum = f32[64,16]{1,0} all-reduce-start(%a), replica_groups={}, to_apply=%add
    }
    """)
Q, K, ROW, OTHER = "bf16[2,96,5,64]{3,2,1,0}", "bf16[2,32,5,64]{3,2,1,0}", "f32[2,5,96]{2,1,0}", "f32[1]{0}"


@pytest.mark.parametrize(
    "call, products",
    [
        (f"({Q}, {ROW}, {OTHER}) custom-call(%q, %k, %k, %q, %k, %k)", 2),  # forward
        (f"({Q}, {ROW}, {Q}) custom-call(%q, %k, %v, %dq, %dk, %dv)", 2 + 4),  # with the tangent; S is there
        (f"({Q}) custom-call(%q, %k, %v, %q, %row, %dq, %dk, %dv)", 5),  # tangent
        (f"({Q}) custom-call(%q, %k, %v, %q, %row, %dq, %k, %v)", 3),  # along q alone
        (f"({ROW}) custom-call(%q, %q)", 0),  # delta
        (f"({K}, {K}) custom-call(%q, %k, %v, %row, %q, %row)", 4),
        (f"({Q}) custom-call(%q, %k, %v, %row, %q, %row)", 3),
    ],
)
def test_a_program_for_gpus(call, products):
    """Products of [queries, d] and [d, keys] as the docstring of kernels.bench counts them."""
    tangents = "".join(f"  %{name} = {Q if name == 'dq' else K} parameter(9)\n" for name in ("dq", "dk", "dv", "v"))
    text = GPU.replace("CALL", call).replace("  %gemm", tangents + "  %gemm")
    work = hlo.read(text)
    assert work.flops == 2 * 64 * 16 * 48 + products * 2 * 2 * 5 * 96 * 32 * 64
    assert not work.kernels and work.collectives[0].group == (0, 1, 2, 3)


@pytest.mark.parametrize(
    "spelling, group",
    [
        ("replica_groups={{0,2},{1,3}}", (0, 2)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", (0, 1, 4, 5)),
        ("replica_groups=mesh['a'=1,'b'=2,'c'=4], device_ids=([4,2]T(1,0)) {'c'}", (0, 2, 4, 6)),
        ("replica_groups={}", ()),
        ("source_target_pairs={{3,0},{0,3}}", (3, 0)),
    ],
)
def test_groups_of_devices(spelling, group):
    assert hlo.group(hlo.Instruction("x", "f32[]", "all-reduce", f"%y), channel_id=1, {spelling}, x=1", False)) == group


def test_text_that_is_no_program():
    with pytest.raises(ValueError, match="no entry computation"):
        hlo.read("HloModule empty")
