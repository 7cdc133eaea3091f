{{ config(materialized='view') }}

with

states as (

    select * from {{ ref('products_history') }}

),

final as (

    select
        product_id,
        cost,
        if(
            row_number() over (partition by product_id order by dbt_valid_from) = 1,
            timestamp '0001-01-01',
            dbt_valid_from
        ) as known_from,
        lead(dbt_valid_from) over (partition by product_id order by dbt_valid_from) as known_to
    from states

)

select * from final
