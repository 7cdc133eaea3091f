with

raw_orders as (

    select * from {{ source('raw', 'raw_orders') }}

),

final as (

    select
        order_id,
        user_id,
        product_id,
        quantity,
        amount,
        amount_numeric,
        country,
        created_date,
        {{ local_date('created_date') }} as order_date,
        event_ts,
        {{ local_date('event_ts') }} as local_date,
        {{ local_part('hour', 'event_ts') }} as local_hour,
        mod({{ local_part('dayofweek', 'event_ts') }} + 5, 7) + 1 as local_weekday,
        status,
        status = 'Fraud' as is_fraud,
        reasons,
        suppressed_reasons,
        rules_version,
        source,
        -- The text is what a load is reconciled by; a number that no float64 has exactly is rounded here, not refused.
        parse_json(attributes, wide_number_mode => 'round') as attributes,
        screened_at,
        ingested_at,
        change_xid
        {%- for name, kind in var('declared_fields').items() %},
        {{ declared_field(name, kind) }} as {{ name }}
        {%- endfor %}
    from raw_orders

)

select * from final
