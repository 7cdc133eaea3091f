with

order_outcomes as (

    select * from {{ source('raw', 'order_outcomes') }}

),

final as (

    select
        outcome_id,
        order_id,
        outcome,
        reviewed_by,
        decided_at,
        row_number() over (partition by order_id order by decided_at desc, outcome_id desc) = 1 as is_newest,
        source,
        ingested_at,
        change_xid
    from order_outcomes

)

select * from final
